"""An index as tools for agents: a server of the Model Context Protocol (https://modelcontextprotocol.io).

The tools are `search`, `get` (a document, or lines of it) and `status`. Over stdio, standard output belongs to the
protocol, so nothing else may write there; `mcp_http` serves the same tools over HTTP.
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
MAX_CHARACTERS = 20_000
"""Maximum length of a text that `get` returns at once."""


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
    corrected_query: str | None = Field(
        description="The query with its typos corrected, if it had any: what was searched for."
    )
    reasoning: str | None = Field(description="The reasoning that the search model read: yours, else its own.")
    read: list[str] = Field(
        description="The ids of the passages of a first search that the search model read; usually none."
    )
    passages: list[Passage]


class DocumentText(BaseModel):
    """A document, or a part of it."""

    id: str = Field(description="The document's id.")
    title: str
    path: str
    start_line: int = Field(description="The first line of the text in its file; 0 if it has no lines.")
    end_line: int
    text: str
    next_line: int = Field(
        description="The line at which the rest begins that was left out because of its length: get it with "
        "start_line. 0 if nothing was left out."
    )
    truncated: bool = Field(description="Whether the end was left out.")
    metadata: dict[str, Any]


class IndexStatus(BaseModel):
    """What the index contains, and whether it can be searched."""

    name: str
    model: str
    model_loaded: bool = Field(description="Searches by meaning wait until the model is loaded; mode text does not.")
    passages: int
    documents: int | None
    complete: bool = Field(description="False if its last build was interrupted.")
    created: str
    fields: dict[str, str] = Field(description="The fields that `where` may name, with their types.")
    folders: dict[str, int] = Field(description="The largest folders, with their numbers of documents.")
    types: dict[str, int] = Field(description="The most frequent kinds of files.")
    headings: list[str] = Field(description="Some headings, as examples of what it is about.")


class IndexServer(MCPServer):
    """A server with tools over one index. The index is opened when the tools are first listed or called, so that
    connecting is fast; the model is loaded afterwards, in a thread.

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
        await anyio.to_thread.run_sync(self._ensure_tools)
        tools = await super().list_tools()
        if self._load:
            self._load = False
            known = self._searcher, self._reasoning, self._read
            threading.Thread(target=_load, args=known, name="load model", daemon=True).start()
        return tools

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        await anyio.to_thread.run_sync(self._ensure_tools)
        return await super().call_tool(name, arguments, context)

    def _ensure_tools(self) -> None:
        with self._adding:
            if not self._ready:
                try:
                    self._add_search_tool(self._searcher.index)
                except InputError as error:
                    raise ToolError(str(error)) from error
                self._add_get_tool()
                self._add_status_tool()
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
                corrected_query=result.corrected_query,
                reasoning=result.reasoning.text if result.reasoning else None,
                read=[passage.id for passage in result.read],
                passages=[_passage(rank, hit) for rank, hit in enumerate(result.hits, start=1)],
            )

        self.add_tool(
            search,
            description=f"Search {searcher.name} ({about}) and return the passages that answer the query, best "
            "first, with their locations.",
            annotations=_reading("Search"),
        )

    def _add_get_tool(self) -> None:
        searcher = self._searcher

        def get(
            id: Annotated[str, Field(description="The id of a document or of a passage, as in a search's results.")],
            start_line: Annotated[
                int | None, Field(description="The first line to return; omit for the beginning.", ge=1)
            ] = None,
            end_line: Annotated[int | None, Field(description="The last line; omit for the end.", ge=1)] = None,
        ) -> DocumentText:
            try:
                found = searcher.index.document(id, start_line, end_line, MAX_CHARACTERS)
            except InputError as error:
                raise ToolError(str(error)) from error
            return DocumentText(**{name: getattr(found, name) for name in DocumentText.model_fields})

        self.add_tool(
            get,
            description=f"Return a document of {searcher.name}, or some of its lines, such as those around a passage "
            f"that was found; at most {MAX_CHARACTERS:,} characters at once. The id of a passage returns that passage, "
            "or with lines those of its document.",
            annotations=_reading("Get a document"),
        )

    def _add_status_tool(self) -> None:
        searcher = self._searcher

        def status() -> IndexStatus:
            try:
                index = searcher.index
                overview = index.overview()
                complete = index.run(lambda opened: opened.complete)
            except InputError as error:
                raise ToolError(str(error)) from error
            return IndexStatus(
                name=searcher.name,
                model=index.info.model_name,
                model_loaded=searcher.loaded,
                passages=overview.chunks,
                documents=overview.documents,
                complete=complete,
                created=overview.created,
                fields=index.columns,
                folders={one.name: one.documents for one in overview.folders},
                types={one.name: one.documents for one in overview.types},
                headings=list(overview.headings),
            )

        self.add_tool(
            status,
            description=f"What {searcher.name} contains (documents, folders, kinds of files, fields to filter on), and "
            "whether its model is loaded.",
            annotations=_reading("Status"),
        )


def _reading(title: str) -> ToolAnnotations:
    return ToolAnnotations(title=title, read_only_hint=True, idempotent_hint=True, open_world_hint=False)


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
