"""`jobstatus completion`: the script by which a shell completes commands, flags, states and the ids of jobs."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

SHELLS = ("bash", "zsh", "fish")

VARIABLE = "_JOBSTATUS_COMPLETE"
"""What the script sets when it asks us."""


@click.command()
@click.argument("shell", metavar="|".join(SHELLS), type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, /, *, shell: str) -> None:
    """Print the script that completes what is typed.

    \b
    For this session, or in the shell's startup file:
      bash  eval "$(jobstatus completion bash)"
      zsh   eval "$(jobstatus completion zsh)"
      fish  jobstatus completion fish | source

    Ids come from the server that --address or JOBSTATUS_ADDRESS names.
    """
    cls = get_completion_class(shell)
    assert cls is not None
    click.echo(cls(ctx.find_root().command, {}, "jobstatus", VARIABLE).source())


class WholeWords(BashComplete):
    """Bash breaks words at `:` and `=`, which addresses, ids and labels hold: joins them again.

    Of what is offered it gives Bash what follows the last break, which is what Bash replaces.
    """

    name = "bash"
    _typed = ""
    """What of the last word stands before its last break."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one that is being typed, and that."""
        before, current = super().get_completion_args()
        words: list[str] = []
        follows_break = False
        for word in (*before, current):
            is_break = bool(word) and not word.strip(":=")
            if words and word and (is_break or follows_break):
                self._typed = words[-1] + (word if is_break else "")
                words[-1] += word
            else:
                self._typed = ""
                words.append(word)
            follows_break = is_break
        return words[:-1], words[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """Return what Bash is to put in place of what stands after the break."""
        typed = self._typed.partition("=")[2] if self._typed.startswith("-") else self._typed
        item.value = item.value.removeprefix(typed)
        return super().format_completion(item)


def prepare() -> None:
    """Have Bash answered as above."""
    add_completion_class(WholeWords)
