"""Training pairs written by a language model: `pipeline` plans, asks, checks by a round trip, resumes after a kill."""
