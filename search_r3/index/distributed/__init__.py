"""Many machines, one index: the corpus is encoded by Ray Data's workers and becomes visible in one Lance commit.

from search_r3.index.distributed import Cluster, ModelSource, build_distributed
build_distributed("s3://bucket/index", open_source("corpus.jsonl"), ModelSource("NAME"), Cluster("auto", workers=64))
"""

from search_r3.index.distributed.cluster import Cluster
from search_r3.index.distributed.ray_build import build_distributed
from search_r3.index.distributed.ray_worker import ModelSource

__all__ = ["Cluster", "ModelSource", "build_distributed"]
