"""The engine llama.cpp: a model as GGUF, run by llama.cpp in this process."""
