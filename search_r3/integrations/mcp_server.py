"""An index as a tool for agents: a server of the Model Context Protocol (https://modelcontextprotocol.io) over stdio.

It has one tool, `search`. Standard output belongs to the protocol, so nothing else may write there.
"""

# No "from __future__ import annotations" here: the tool's annotations name an index's columns, so they must be objects.

import sys
import threading
from typing import Annotated, Any, Literal

from search_r3 import __version__
from search_r3.errors import InputError
from search_r3.integrations.index_searcher import IndexSearcher
from search_r3.optional import optional_imports

with optional_imports("mcp", "agents' access by MCP"):
    import anyio
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.types import ToolAnnotations
    from pydantic import BaseModel, Field

MAX_PASSAGES = 50
"""Maximum number of results per call, since an agent's context is limited."""


class Passage(BaseModel):
    """One passage result."""

    rank: int
    id: str
    title: str
    text: str
    path: str = Field(description="The file it comes from; empty if the source is not a file.")
    start_line: int
    end_line: int
    score: float
    metadata: dict[str, Any]


class SearchResults(BaseModel):
    """The result of a search."""

    query: str
    reasoning: str | None = Field(description="The reasoning that the search model read: yours, else its own.")
    read: list[str] = Field(
        description="The ids of the passages of a first search that the search model read; usually none."
    )
    passages: list[Passage]


class IndexServer(MCPServer):
    """A server with the tool `search` over one index. The index is opened when its tools are first listed or called,
    so that connecting is fast; the model is loaded afterwards, in a thread.

    Args:
        searcher: the index.
        reasoning, max_reasoning_tokens: how queries are embedded, unless the agent gives its own reasoning. With
            "auto", the first search that needs the model fails if the model has no rule.
        read, hops: see `SearchIndex.search`.
        load: load the model after the tools are first listed; otherwise the first search that needs it does.
    """

    def __init__(
        self,
        searcher: IndexSearcher,
        *,
        reasoning: bool | Literal["auto", "latent"] = True,
        max_reasoning_tokens: int = 32,
        read: int = 0,
        hops: int = 1,
        load: bool = False,
    ) -> None:
        super().__init__("search-r3", instructions=f"Search the index {searcher.name}.", version=__version__)
        self._searcher, self._reasoning, self._budget, self._load = searcher, reasoning, max_reasoning_tokens, load
        self._read, self._hops = read, hops
        self._ready = False
        self._adding = threading.Lock()

    async def list_tools(self) -> list[Any]:
        await anyio.to_thread.run_sync(self._ensure_search_tool)
        tools = await super().list_tools()
        if self._load:
            self._load = False
            known = self._searcher, self._reasoning, self._read
            threading.Thread(target=_load, args=known, name="load model", daemon=True).start()
        return tools

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        await anyio.to_thread.run_sync(self._ensure_search_tool)
        return await super().call_tool(name, arguments, context)

    def _ensure_search_tool(self) -> None:
        with self._adding:
            if not self._ready:
                try:
                    self._add_search_tool(self._searcher.index)
                except InputError as error:
                    raise ToolError(str(error)) from error
                self._ready = True

    def _add_search_tool(self, index: Any) -> None:
        searcher = self._searcher
        about = f"{len(index):,} passages, embedded by {index.info.model_name}"

        def search(
            query: Annotated[str, Field(description="What to look for, in plain words: a question or key terms.")],
            k: Annotated[int, Field(description="How many passages.", ge=1, le=MAX_PASSAGES)] = 5,
            mode: Annotated[
                Literal["hybrid", "vector", "text"],
                Field(
                    description="vector: by meaning; text: by exact words; hybrid: both. hybrid suits most questions."
                ),
            ] = "hybrid",
            where: Annotated[
                str | None,
                Field(description=f"SQL condition on the fields {', '.join(index.columns)}; omit for none."),
            ] = None,
            reasoning_text: Annotated[
                str | None,
                Field(
                    description="Your own reasoning about the query in a few words or sentences: what it asks for, "
                    "facts that you know, the probable answer. The search model reads it in place of its own; leave it "
                    "out if you would only guess. mode must then be vector or hybrid."
                ),
            ] = None,
        ) -> SearchResults:
            try:
                result = searcher.search(
                    query,
                    k=k,
                    mode=mode,
                    where=where,
                    reasoning=self._reasoning if reasoning_text is None else True,
                    max_reasoning_tokens=self._budget,
                    reasoning_text=reasoning_text,
                    read=self._read,
                    hops=self._hops,
                )
            except InputError as error:  # the agent can fix it; all other errors are internal and hidden from it
                raise ToolError(str(error)) from error
            return SearchResults(
                query=result.query,
                reasoning=result.reasoning.text if result.reasoning else None,
                read=[passage.id for passage in result.read],
                passages=[_passage(rank, hit) for rank, hit in enumerate(result.hits, start=1)],
            )

        self.add_tool(
            search,
            description=f"Search {searcher.name} ({about}) and return the passages that answer the query, best "
            "first, with their locations.",
            annotations=ToolAnnotations(
                title="Search", read_only_hint=True, idempotent_hint=True, open_world_hint=False
            ),
        )


def build_server(
    searcher: IndexSearcher,
    *,
    reasoning: bool | Literal["auto", "latent"] = True,
    max_reasoning_tokens: int = 32,
    read: int = 0,
    hops: int = 1,
) -> MCPServer:
    """An `IndexServer`; `server.run()` serves standard input and output.

    Args:
        searcher: the index.
        reasoning, max_reasoning_tokens: how queries are embedded, unless the agent gives its own reasoning.
        read, hops: see `SearchIndex.search`.
    """
    return IndexServer(searcher, reasoning=reasoning, max_reasoning_tokens=max_reasoning_tokens, read=read, hops=hops)


def serve_stdio(
    searcher: IndexSearcher,
    *,
    reasoning: bool | Literal["auto", "latent"] = True,
    max_reasoning_tokens: int = 32,
    read: int = 0,
    hops: int = 1,
) -> None:
    """Serve until the client disconnects. The model is loaded in the background, so that connecting is fast."""
    server = IndexServer(
        searcher, reasoning=reasoning, max_reasoning_tokens=max_reasoning_tokens, read=read, hops=hops, load=True
    )
    server.run("stdio")


def _load(searcher: IndexSearcher, reasoning: bool | Literal["auto", "latent"], read: int) -> None:
    try:
        searcher.load(reasoning, read)
    except InputError as error:  # the first search raises it again, where the agent can read it
        print(f"error: {error}", file=sys.stderr)


def _passage(rank: int, hit: Any) -> Passage:
    fields = Passage.model_fields.keys() - {"rank"}
    return Passage(rank=rank, **{name: getattr(hit, name) for name in fields})
