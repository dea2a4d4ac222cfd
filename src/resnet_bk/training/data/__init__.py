"""Text to batches: corpora, tokenizers, the held-out split, the token cache, the sampler."""

from resnet_bk.training.data.batches import evaluation_batches as evaluation_batches
from resnet_bk.training.data.batches import training_batch as training_batch
from resnet_bk.training.data.corpus import Corpus as Corpus
from resnet_bk.training.data.corpus import Document as Document
from resnet_bk.training.data.corpus import load_corpus as load_corpus
from resnet_bk.training.data.dataset import TokenDataset as TokenDataset
from resnet_bk.training.data.dataset import TokenSplit as TokenSplit
from resnet_bk.training.data.dataset import prepare_dataset as prepare_dataset
from resnet_bk.training.data.dataset import tokenize_all as tokenize_all
from resnet_bk.training.data.dataset import unigram_entropy as unigram_entropy
from resnet_bk.training.data.tokenizer import TextTokenizer as TextTokenizer
from resnet_bk.training.data.tokenizer import train_tokenizer as train_tokenizer

__all__ = [
    "Corpus",
    "Document",
    "TextTokenizer",
    "TokenDataset",
    "TokenSplit",
    "evaluation_batches",
    "load_corpus",
    "prepare_dataset",
    "tokenize_all",
    "train_tokenizer",
    "training_batch",
    "unigram_entropy",
]
