"""`jobstatus completion`: a script for the shell that completes commands, flags, states and job ids.

The values are completed by options.complete_states and options.complete_job_ids.
"""

from __future__ import annotations

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
)

SHELLS = ("bash", "zsh", "fish")

VARIABLE = "_JOBSTATUS_COMPLETE"
"""The variable that the script sets when it runs us for completions."""


@click.command()
@click.argument("shell", metavar="|".join(SHELLS), type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, /, *, shell: str) -> None:
    """Print the script for completion in a shell.

    \b
    Run this, or add it to the shell's startup file:
      bash  eval "$(jobstatus completion bash)"
      zsh   eval "$(jobstatus completion zsh)"
      fish  jobstatus completion fish | source

    Job ids are read from the server at --address or JOBSTATUS_ADDRESS.
    """
    prepare()
    cls = get_completion_class(shell)
    assert cls is not None
    click.echo(cls(ctx.find_root().command, {}, "jobstatus", VARIABLE).source())


class WholeWordsBashComplete(BashComplete):
    """Completes words with `:` and `=`, as in addresses, ids and labels: Bash splits words there.

    The parts of a word are joined before it is completed. A completion is returned without the part before the last
    split, because Bash replaces only the part after it.
    """

    name = "bash"
    _typed = ""
    """The part of the last word before its last split."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is completed, and that word."""
        before, current = super().get_completion_args()
        words: list[str] = []
        follows_split = False
        for word in (*before, current):
            is_split = bool(word) and not word.strip(":=")
            if words and word and (is_split or follows_split):
                self._typed = words[-1] + (word if is_split else "")
                words[-1] += word
            else:
                self._typed = ""
                words.append(word)
            follows_split = is_split
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return the completion as Bash expects it: without the part before the last split."""
        typed = self._typed.partition("=")[2] if self._typed.startswith("-") else self._typed
        item.value = item.value.removeprefix(typed)
        return super().format_completion(item)


class _WithFlag(ShellComplete):
    """Completes `--flag=val` to `--flag=value`: zsh and fish replace the whole word; click gives the value only."""

    _flag = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is completed, and that word."""
        words, incomplete = super().get_completion_args()
        flag, equals, _ = incomplete.partition("=")
        self._flag = flag + equals if flag.startswith("--") and equals else ""
        return words, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """Return the completion with the flag before it."""
        item.value = self._flag + item.value
        return super().format_completion(item)


class WholeWordsZshComplete(_WithFlag, ZshComplete):
    """Completes `--flag=val` in zsh."""


class WholeWordsFishComplete(_WithFlag, FishComplete):
    """Completes `--flag=val` in fish, and shows the whole name of a job with a comma."""

    source_template = FishComplete.source_template.replace('string split ","', 'string split --max 1 ","')


def prepare() -> None:
    """Register the completions with click."""
    for cls in (WholeWordsBashComplete, WholeWordsZshComplete, WholeWordsFishComplete):
        add_completion_class(cls)
