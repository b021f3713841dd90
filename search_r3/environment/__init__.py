"""The retrieval environment of stage 2: a corpus whose embeddings follow the model, and the rewards.

`live_corpus` stores the vectors and searches them exactly, `neighbor_graph` keeps the nearest neighbors of every row,
`refresh_policies` choose what to re-encode, `rewards` score the rankings, and `retrieval` combines these. Nothing here
imports a model.
"""
