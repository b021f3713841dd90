"""The retrieval environment of stage 2: a corpus whose embeddings move with the model, and the rewards.

`live_corpus` holds the vectors and searches them exactly, `neighbor_graph` knows which rows lie near which,
`refresh_policies` choose what to re-encode, `rewards` turn cosines into numbers, and `retrieval` runs them in order.
Nothing here imports a model.
"""
