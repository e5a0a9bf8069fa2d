"""``lockstep data prepare``: text into token shards, for jobs that read it again and again."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from pydantic import BaseModel, ValidationError

from lockstep_api.v1alpha1 import DataSource, S3Spec, TokenizerTraining
from lockstep_cli import manifest, store
from lockstep_cli.errors import CliError
from lockstep_cli.output import Output

_SHARD_TOKENS = 1 << 27
_OPTIONS = {"vocab_size": "vocab-size", "vocabSize": "vocab-size"}


def register(commands: argparse._SubParsersAction[Any]) -> argparse.ArgumentParser:
    """Adds the command."""
    parser: argparse.ArgumentParser = commands.add_parser("data", help="prepare training data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="write text as token shards, for sources of format tokens")
    prepare.add_argument(
        "uri", nargs="+", metavar="URI", help="text, JSONL or Parquet: a path, file:// or s3://, with ** and *"
    )
    prepare.add_argument(
        "--to",
        required=True,
        metavar="URI",
        help="empty folder that shards and tokenizer.json go to: a path, file:// or s3://",
    )
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", metavar="URI", help="a tokenizer.json, or the folder that has one: a path, file:// or s3://"
    )
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
    if arguments.shard_tokens < 1:
        raise CliError(f"--shard-tokens {arguments.shard_tokens}: write a number from 1")
    s3 = S3Spec(endpoint=arguments.endpoint, path_style=arguments.endpoint is not None)
    to = store.as_uri(arguments.to).rstrip("/")
    try:
        shards = open_store(to, s3)
    except UserError as error:
        raise CliError(f"--to: {error}") from None
    try:
        sources = [_source(number, place, arguments) for number, place in enumerate(arguments.uri)]
        files = find_files(sources, s3, "URI")
        if arguments.tokenizer:
            uri = store.as_uri(arguments.tokenizer)
            tokenizer = load_tokenizer(uri, s3, "--tokenizer")
            end = end_of_text(tokenizer, load_config(uri, s3, "--tokenizer"), "--tokenizer")
        else:
            tokenizer = train_tokenizer(texts(files, TRAINING_CHARACTERS), _training(arguments))
            end = end_of_text(tokenizer)
        written = write_shards(files, tokenizer, end, shards, shard_tokens=arguments.shard_tokens)
    except (UserError, StoreError) as error:
        raise CliError(str(error)) from None
    output.result(
        {"shards": written.shards, "documents": written.documents, "tokens": written.tokens, "uri": f"{to}/*.tokens"},
        f"{written.tokens:,} tokens of {written.documents:,} documents in {written.shards} shards.\n"
        f"In the job: trainer.tokenizer.uri {to}/tokenizer.json, and a source with uri {to}/*.tokens",
    )
    return 0


def _source(number: int, place: str, arguments: argparse.Namespace) -> DataSource:
    given = {"format": arguments.format, "field": arguments.field, "exclude": arguments.exclude}
    try:
        return DataSource.model_validate({"name": f"source-{number}", "uri": store.as_pattern(place), **given})
    except ValidationError as error:
        raise _refused(error, DataSource) from None


def _training(arguments: argparse.Namespace) -> TokenizerTraining:
    try:
        return TokenizerTraining(kind=arguments.train, vocab_size=arguments.vocab_size)
    except ValidationError as error:
        raise _refused(error, TokenizerTraining) from None


def _refused(error: ValidationError, model: type[BaseModel]) -> CliError:
    """The first mistake, with the option that it was given in."""
    first: dict[str, Any] = dict(error.errors(include_url=False)[0])
    place = str(first["loc"][0])
    option = "URI" if place == "uri" else f"--{_OPTIONS.get(place, place)}"
    return CliError(f"{option}: {manifest.complaint(first, model)}")
