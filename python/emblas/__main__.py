"""Command line: ``python -m emblas info`` and ``python -m emblas encode``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from emblas._info import info, render


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m emblas", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser(
        "info", help="versions, instruction set, threads, backends of each op"
    )
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    info_parser.set_defaults(run=_info)
    encode = commands.add_parser(
        "encode", help="embed the texts of a file; the same command goes on after a stop"
    )
    encode.set_defaults(run=_encode)
    encode.add_argument("input", type=Path, help="lines, .jsonl, .csv or .tsv, also compressed")
    encode.add_argument("folder", type=Path, help="where the embeddings go")
    encode.add_argument("--model", required=True, help="folder or name of the model")
    encode.add_argument("--field", help="key or column of the text (default: text)")
    encode.add_argument("--outputs", nargs="+", default=["dense"], help="dense, int8, bits, ...")
    encode.add_argument("--dims", nargs="+", type=int, help="lengths for the output matryoshka")
    encode.add_argument("--branches", nargs="+", help="texts behind each, for the output branches")
    encode.add_argument("--chunk-size", type=int, help="tokens of a vector of the output chunks")
    encode.add_argument("--chunk-overlap", type=int, help="tokens that neighboring chunks share")
    encode.add_argument("--prompt", help="a text, or the name of one of the model")
    encode.add_argument("--max-length", type=int, help="most tokens of a text, if fewer")
    encode.add_argument("--shard-size", type=int, default=8192, help="texts in a file")
    encode.add_argument("--token-budget", type=int, default=2048, help="most tokens in a batch")
    encode.add_argument("--device", help="cpu, cuda, ...")
    encode.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"python -m emblas {arguments.command}: {error}\n")


def _info(arguments: argparse.Namespace) -> None:
    facts = info()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))


def _encode(arguments: argparse.Namespace) -> None:
    from emblas.encoder import Encoder, encode_file, read_texts

    def given(*names: str) -> dict[str, Any]:
        values = {name: getattr(arguments, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    encoder = Encoder.load(arguments.model, **given("device", "token_budget", "max_length"))
    begin = time.perf_counter()
    report = encode_file(
        encoder,
        read_texts(arguments.input, arguments.field),
        arguments.folder,
        outputs=arguments.outputs,
        dims=arguments.dims,
        prompt=arguments.prompt,
        shard_size=arguments.shard_size,
        progress=not arguments.quiet,
        **given("branches", "chunk_size", "chunk_overlap"),
    )
    print(
        f"{report['texts']} texts in {arguments.folder}, {report['encoded']} of them encoded now "
        f"in {time.perf_counter() - begin:.1f} s; {report['cut']} were cut to "
        f"{encoder.max_length} tokens"
    )


if __name__ == "__main__":
    main()
