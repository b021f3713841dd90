"""What a rollout is judged by: a corpus whose embeddings move with the model, and the rewards.

`corpus` holds the vectors and searches them exactly, `graph` says which rows lie near which, `refresh` chooses what
to re-encode, `rewards` turns cosines into numbers, `retrieval` puts them in order. Nothing here knows of models.
"""
