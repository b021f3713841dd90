"""The first help page: commands in groups, each with its whole first sentence."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

GROUPS: dict[str, tuple[str, ...]] = {
    "Search": ("demo", "ask", "index", "search", "tune", "serve", "encode", "mcp", "delete", "compact", "backup",
               "restore"),
    "Evaluate": ("evaluate", "mteb", "study", "rollouts", "report", "tables"),
    "Train": ("data", "train", "adapt", "plot", "card"),
    "Models": ("models", "export", "push", "pull"),
}  # fmt: skip
"""Heading -> commands, in the order in which they are listed."""


class GroupedHelp(TyperGroup):
    """A group of commands whose help lists them by `GROUPS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands in the order of `GROUPS`; others come last."""
        grouped = [name for names in GROUPS.values() for name in names if name in self.commands]
        return grouped + [name for name in self.commands if name not in grouped]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group."""
        for heading, names in GROUPS.items():
            rows = [(name, _first_sentence(self.commands[name])) for name in names]
            with formatter.section(heading):
                formatter.write_dl(rows)


def _first_sentence(command: Any) -> str:
    return command.get_short_help_str(limit=200).removesuffix(".")
