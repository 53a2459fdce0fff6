"""Functions for the data that a pipeline trains on."""

from .runtime.data.dataset_loader import batches as batches
from .runtime.data.documents import cut_documents as cut_documents
from .runtime.data.padding import PADDING as PADDING
from .runtime.data.padding import pad_to_multiple as pad_to_multiple
from .runtime.data.resumable import Resumable as Resumable
