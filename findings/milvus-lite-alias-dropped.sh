#!/bin/sh
# pymilvus 3.0.2 with milvus-lite 3.2.2: to drop an alias by drop_collection deletes the collection that it leads to.
#
# Expected: drop_collection of a name that is an alias is refused, as a Milvus server documents it; drop_alias removes the alias alone.
# Seen: drop_collection("current"), an alias of "build_1", returns without an error, and "build_1" with all its rows is gone.
# After a restart of the process a collection is not in memory either: search is refused until load_collection.
#
# In Search-R3: an index in Milvus is a collection behind an alias; collections are dropped by their own names only, and loaded
# whenever they are opened (search_r3/index/backends/milvus/collections.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check pymilvus==3.0.2 milvus-lite==3.2.2
cat > "$work/first.py" <<'PYTHON'
import sys

from pymilvus import MilvusClient

client = MilvusClient(sys.argv[1])
for name in ("build_1", "build_2"):
    client.create_collection(name, dimension=2)
    client.insert(name, [{"id": 1, "vector": [1.0, 0.0]}])
client.create_alias("build_1", "current")
found = client.search("build_2", data=[[1.0, 0.0]], limit=1)
client.drop_collection("current")
print(f"collections: {', '.join(sorted(client.list_collections()))}; a search before: {len(found[0])} hit", end="; ")
client.close()
PYTHON
cat > "$work/second.py" <<'PYTHON'
import sys

from pymilvus import MilvusClient, MilvusException

client = MilvusClient(sys.argv[1])
try:
    found = len(client.search("build_2", data=[[1.0, 0.0]], limit=1)[0])
except MilvusException:
    found = "refused"
client.load_collection("build_2")
print(f"in a new process: {found}, after load_collection: {len(client.search('build_2', data=[[1.0, 0.0]], limit=1)[0])} hit")
PYTHON
found=$("$work/venv/bin/python" "$work/first.py" "$work/notes.db" 2>/dev/null; "$work/venv/bin/python" "$work/second.py" "$work/notes.db" 2>/dev/null)
echo "$found"
case "$found" in
"collections: build_2; a search before: 1 hit; in a new process: refused, after load_collection: 1 hit") echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
