# What is run often. `make` alone lists it.
.PHONY: help install test test-all golden lint format

help:
	@grep -E '^[a-z-]+:.*#' Makefile | sed 's/:.*#/\t/'

install: # the package, editable, with what the tests need
	pip install -e '.[test]'

test: # the default tests: minutes on two cores
	pytest

test-all: # and the slow ones
	pytest -m ''

golden: # what the scripts print with the embedded checkpoint, which the tests compare with
	python tests/examples/golden.py

lint: # style and types, as CI checks them
	ruff check .
	ruff format --check .
	mypy --strict llama

format: # put the code into shape
	ruff check --fix .
	ruff format .
