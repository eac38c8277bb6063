# What is run often. `make` alone lists it.
.PHONY: help install test test-all lint format

help:
	@grep -E '^[a-z-]+:.*#' Makefile | sed 's/:.*#/\t/'

install: # the package, editable, with what the tests need
	pip install -e '.[test]'

test: # the default tests: minutes on two cores
	pytest

test-all: # and the slow ones
	pytest -m ''

lint: # style and types, as CI checks them
	ruff check .
	ruff format --check .
	mypy --strict llama

format: # put the code into shape
	ruff check --fix .
	ruff format .
