"""Save an untrained encoder: the vector of a string is the mean of random vectors of its tokens.

    python scripts/new_encoder.py --tokenizer bundled:all-minilm-l6-v2 -o runs/pairs/encoder

Such a static encoder is trained from scratch on a CPU in a minute, so that what pre-training adds is measured
from zero.
"""

import sys

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from transformers import set_seed

from rlkit.arguments.command_line import CommandParser, folder_path
from rlkit.commands.run import run_command
from rlkit.errors import check_integer
from rlkit.retrieval.collections.write import new_folder
from rlkit.retrieval.encoders import load_encoder


def main() -> int:
    """Save the encoder and print its size."""
    parser = CommandParser(description="Save an untrained static encoder.")
    add = parser.add_argument
    add("--tokenizer", default="bundled:all-minilm-l6-v2", metavar="MODEL",
        help="encoder whose tokenizer is used (default: %(default)s)")  # fmt: skip
    add("--dimensions", type=int, default=128, help="size of a vector (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed of the vectors (default: %(default)s)")
    add("-o", "--out", type=folder_path, required=True, metavar="FOLDER", help="output folder of the encoder")
    options = parser.parse_args(sys.argv[1:])
    check_integer("--dimensions", options.dimensions, 1)
    set_seed(options.seed)
    fast = load_encoder(options.tokenizer).tokenizer.backend_tokenizer
    tokenizer = Tokenizer.from_str(fast.to_str())
    tokenizer.no_truncation()  # the mean may be over any number of tokens
    embedding = StaticEmbedding(tokenizer, embedding_dim=options.dimensions)
    torch.nn.init.normal_(embedding.embedding.weight)
    with new_folder(options.out) as folder:
        SentenceTransformer(modules=[embedding], similarity_fn_name="cosine").save_pretrained(str(folder))
    print(f"{embedding.embedding.weight.shape[0]:,} tokens, {options.dimensions} dimensions: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
