"""Completion for bash: `diffusion_lit completion` prints a script with every command, option and class in it.

    diffusion-lit completion > ~/.local/share/bash-completion/completions/diffusion-lit

The script knows the words itself, so that completing takes no time.
"""

from collections.abc import Iterator, Mapping, Sequence

from diffusion_lit.cli import command_slots
from diffusion_lit.main import COMMANDS, TOOLS
from diffusion_lit.parts import Slot, candidates, signature, takes
from diffusion_lit.recipes import names

SCRIPT = """_diffusion_lit() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "$before" in
      -c | --config) words="{recipes}" ;;
{classes}
    esac
    if [ -z "$words" ]; then
      case "${{COMP_WORDS[1]}}" in
{options}
      esac
    fi
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "$before" in -*) COMPREPLY+=($(compgen -f -- "$word")) ;; esac
}}
complete -F _diffusion_lit diffusion-lit diffusion_lit"""


def keys(slots: Mapping[str, Slot], prefix: str = "", depth: int = 3) -> Iterator[tuple[str, Slot]]:
    """Options and their slots; of parts, those of the class that is meant without another, or else of each class."""
    for name, slot in slots.items():
        yield f"{prefix}{name}", slot
        bases = takes(slot.hint).bases
        parts = [slot.hint] if slot.fixed else [slot.implied] if slot.implied else list(candidates(bases).values())
        if depth > 1 and (slot.fixed or slot.implied or prefix):
            for part in parts:
                yield from keys(signature(part, takes(slot.hint).given).slots, f"{prefix}{name}.", depth - 1)


def script() -> str:
    """The script."""
    found = {command: dict(keys(command_slots(command))) for command in COMMANDS if command != "table"}
    choices = {
        key: sorted(candidates(takes(slot.hint).bases))
        for slots in found.values()
        for key, slot in slots.items()
        if takes(slot.hint).bases and not slot.fixed
    }
    classes = [f'      --{key}) words="{" ".join(parts)}" ;;' for key, parts in choices.items()]
    options = [
        f'        {name}) words="-c --help --trust --print_config {" ".join(f"--{key}" for key in sorted(slots))}" ;;'
        for name, slots in found.items()
    ]
    return SCRIPT.format(
        commands=" ".join((*COMMANDS, *TOOLS)),
        recipes=" ".join(names()),
        classes="\n".join(classes),
        options="\n".join(options),
    )


def main(args: Sequence[str]) -> None:
    """Prints the script."""
    if args in (["-h"], ["--help"]):
        print(__doc__)
        return
    if args:
        raise ValueError(f"completion takes no options, such as {args[0]!r}")
    print(script())
