"""The command line: python -m sparse_flax.visualize masks|attention|curves."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from matplotlib.figure import Figure

from sparse_flax import trained, visualize
from sparse_flax.errors import UserError
from sparse_flax.visualize import page, piece


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in a sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise what `main` shows."""
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    """Return the parser of the three commands."""
    root = Parser(prog="python -m sparse_flax.visualize", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    masks = commands.add_parser("masks", help="who sees whom, and in two steps")
    masks.add_argument("patterns", help='as in "Fixed(16, 4)", or a cycle of layers')
    masks.add_argument("--tokens", type=int, help="side of the mask")
    masks.add_argument("--heads", type=int, help="of a layer; as many as differ")

    attention = commands.add_parser("attention", help="what a model looks at")
    attention.add_argument("--workdir", default="", help="a run's")
    attention.add_argument("--model", default="", help="or the folder of an export")
    attention.add_argument("--checkpoint_step", type=int, help="a run's; the newest")
    attention.add_argument("--text", default="", help="to look at")
    attention.add_argument("--file", default="", help="text, picture or sound")
    attention.add_argument("--data", default="", help="where the run's data are now")
    attention.add_argument("--piece", type=int, default=1, help="of held-out data")
    attention.add_argument(
        "--position",
        default="",
        help="of the byte that is predicted: its number; of an image also row,column; "
        "of sound also as in 0.5s",
    )
    attention.add_argument("--layers", default="", help="as in 0,2,5; else up to 8")
    attention.add_argument("--heads", default="", help="as in 0,1; else up to 8")
    attention.add_argument(
        "--shown", type=int, default=1024, help="bytes of a text before the position"
    )

    curves = commands.add_parser("curves", help="loss curves of runs")
    curves.add_argument("runs", nargs="+", help="folders of runs, or metrics.jsonl")
    curves.add_argument("--first", type=int, default=0, help="step to begin with")

    for name, command in commands.choices.items():
        command.add_argument(
            "--output",
            default=f"{name}.png",
            help="a .png or an .html that stands alone",
        )
    return root


def main(argv: list[str]) -> None:
    """Draw what the arguments say, and print where it is.

    Raises:
      UserError: whatever the user can put right, in a sentence.
    """
    args = parser().parse_args(argv)
    output = page.check_output(args.output)
    if args.command == "masks":
        title = args.patterns
        caption = "Dark: keys that a query sees. Light: what it reaches in two layers."
        figure = visualize.masks(args.patterns, args.tokens, heads=args.heads)
    elif args.command == "curves":
        title, caption = "Loss curves", ", ".join(args.runs)
        figure = visualize.curves(args.runs, first=args.first)
    else:
        title, caption, figure = _attention(args)
    page.save(figure, output, title, caption)
    print(f"figure             {output}")


def _attention(args: argparse.Namespace) -> tuple[str, str, Figure]:
    """Return title, caption and figure."""
    folder = args.workdir or args.model
    if not folder or (args.workdir and args.model):
        raise UserError(
            "attention is of one model; name a run's --workdir, or an exported --model"
        )
    layers, heads = _numbers("layers", args.layers), _numbers("heads", args.heads)
    model, config = trained.load(folder, args.checkpoint_step)
    content, source = piece.content(
        config, text=args.text, file=args.file, data=args.data, piece=args.piece
    )
    print(f"looking at         {source}")
    figure = visualize.attention(
        model,
        content,
        piece.position(args.position, config),
        kind=config.data.kind,
        rate=config.data.rate,
        layers=layers,
        heads=heads,
        shown=args.shown,
        say=lambda line: print(line, flush=True),
    )
    caption = (
        f"Where each head looks to predict the byte framed in orange, in {source}: "
        "the square root of its weights, the greatest of each panel full."
    )
    return f"Attention of {folder}", caption, figure


def _numbers(name: str, text: str) -> list[int] | None:
    try:
        return [int(number) for number in text.split(",")] if text else None
    except ValueError:
        raise UserError(
            f"--{name}={text} is not readable; write numbers from 0, as in 0,2,5"
        ) from None


def entry_point() -> None:
    """Run, and answer what the user can put right without a traceback."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "interrupted; run the same command again")


def _end(status: int, sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    entry_point()
