"""``lockstep data prepare``: text into token shards, for jobs that read it again and again."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from pydantic import ValidationError

from lockstep_api.v1alpha1 import DataSource, S3Spec, TokenizerTraining
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output

_SHARD_TOKENS = 1 << 27


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("data", help="prepare training data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="write text as token shards, for sources of format tokens")
    prepare.add_argument(
        "uri", nargs="+", metavar="URI", help="text, JSONL or Parquet, s3:// or file://, with ** and *"
    )
    prepare.add_argument("--to", required=True, metavar="URI", help="empty folder that shards and tokenizer.json go to")
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="URI", help="a tokenizer.json, or the folder that has one")
    tokenizer.add_argument("--train", choices=("bpe", "unigram", "bytes"), help="train one on this text")
    prepare.add_argument("--vocab-size", type=int, default=32768, metavar="N", help="with --train (default: 32768)")
    prepare.add_argument("--format", default="auto", choices=("auto", "text", "jsonl", "parquet"), help="of the files")
    prepare.add_argument("--field", default="text", help="field or column with the text (default: text)")
    prepare.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="paths to leave out")
    prepare.add_argument(
        "--shard-tokens", type=int, default=_SHARD_TOKENS, metavar="N", help=f"of a shard (default: {_SHARD_TOKENS})"
    )
    prepare.add_argument("--endpoint", help="URL of the S3 server (path-style addresses)")
    prepare.add_argument("--output", choices=("text", "json"), default=argparse.SUPPRESS, help="form of the answer")
    prepare.set_defaults(handler=handle)
    return parser


def handle(arguments: argparse.Namespace, output: Output) -> int:
    """Writes the shards."""
    # The library for tokenizers takes a while, and other commands do without it.
    from lockstep_trainer.data.prepare import TRAINING_CHARACTERS
    from lockstep_trainer.data.sources import find_files
    from lockstep_trainer.data.tokenizer import end_of_text, load_config, load_tokenizer, train_tokenizer
    from lockstep_trainer.data.writing import texts, write_shards
    from lockstep_trainer.errors import StoreError, UserError
    from lockstep_trainer.storage import open_store

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    s3 = S3Spec(endpoint=arguments.endpoint, path_style=arguments.endpoint is not None)
    try:
        given = {"format": arguments.format, "field": arguments.field, "exclude": arguments.exclude}
        sources = [
            DataSource.model_validate({"name": f"source-{number}", "uri": uri, **given})
            for number, uri in enumerate(arguments.uri)
        ]
        files = find_files(sources, s3, "URI")
        if arguments.tokenizer:
            tokenizer = load_tokenizer(arguments.tokenizer, s3)
            end = end_of_text(tokenizer, load_config(arguments.tokenizer, s3))
        else:
            training = TokenizerTraining(kind=arguments.train, vocab_size=arguments.vocab_size)
            tokenizer = train_tokenizer(texts(files, TRAINING_CHARACTERS), training)
            end = end_of_text(tokenizer)
        written = write_shards(files, tokenizer, end, open_store(arguments.to, s3), shard_tokens=arguments.shard_tokens)
    except ValidationError as error:
        first = error.errors()[0]
        raise CliError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (UserError, StoreError) as error:
        raise CliError(str(error)) from None
    to = arguments.to.rstrip("/")
    output.result(
        {"shards": written.shards, "documents": written.documents, "tokens": written.tokens, "uri": f"{to}/*.tokens"},
        f"{written.tokens:,} tokens of {written.documents:,} documents in {written.shards} shards.\n"
        f"In the job: trainer.tokenizer.uri {to}/tokenizer.json, and a source with uri {to}/*.tokens",
    )
    return 0
