"""The index as a collection of Milvus: `milvus://HOST:PORT/NAME`, or one of Milvus Lite in a folder."""
