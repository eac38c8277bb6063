"""A server for the clients that people already have: OpenAI's API with infilling, TGI's, llama.cpp's and Ollama's.

`codellama serve` starts it. In Python, `engine.Engine` runs a Llama in a thread of its own, and `app.create_app` makes
the ASGI application around it. README.md follows a request from its socket to the loop and back.
"""
