"""An MCP client, as in an agent's program: start `search-r3 mcp`, list its tools, call `search`.

pip install 'search-r3[mcp]'
python examples/mcp_client.py notes-index "which license did we choose"
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from mcp import Client, StdioServerParameters, stdio_client


async def ask(index: str, question: str) -> None:
    """Start a server for `index`, search it and print the results."""
    server = StdioServerParameters(command=sys.executable, args=["-m", "search_r3", "mcp", index], env=dict(os.environ))
    async with Client(stdio_client(server)) as client:
        for tool in (await client.list_tools()).tools:
            print(f"{tool.name}: {tool.description}")
        done = await client.call_tool("search", {"query": question, "k": 3})
        if done.is_error:
            raise SystemExit(done.content[0].text)
        print(f"reasoning: {done.structured_content['reasoning']}")
        for passage in done.structured_content["passages"]:
            print(f"{passage['rank']}. {passage['id']}: {passage['text'][:80]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="an index that `search-r3 index` made")
    parser.add_argument("question")
    options = parser.parse_args(arguments)
    asyncio.run(ask(options.index, options.question))


if __name__ == "__main__":
    main()
