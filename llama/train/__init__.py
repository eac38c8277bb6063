"""Trains a small Code Llama from nothing: tokenizer, corpus, documents with gaps, one loop, the published format."""
