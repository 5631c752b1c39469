"""llama.cpp's own tokenizer through ctypes: the oracle for what we write of a vocabulary.

Source   llama.h of the llama.cpp inside xllamacpp 2026.10.11549; the loader needs an architecture it knows,
         so the vocabulary stands in a file that calls itself gemma4 and holds no tensors
"""

import ctypes
from pathlib import Path

import gguf
import xllamacpp

_pointer, _int, _bool = ctypes.c_void_p, ctypes.c_int, ctypes.c_bool
KINDS = {"str": "STRING", "u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL"}


class ModelParams(ctypes.Structure):
    """llama_model_params"""

    _fields_ = [
        ("devices", _pointer),
        ("buffer_overrides", _pointer),
        ("n_gpu_layers", _int),
        ("split_mode", _int),
        ("load_mode", _int),
        ("lazy_mode", _int),
        ("main_gpu", _int),
        ("tensor_split", _pointer),
        ("progress", _pointer),
        ("progress_data", _pointer),
        ("overrides", _pointer),
        ("vocab_only", _bool),
        ("other_flags", _bool * 63),  # a later version's flags fit too
    ]


def write_vocabulary(path, metadata, architecture="gemma4") -> Path:
    """A GGUF of metadata alone, by gguf-py. metadata: key → mlx_dgemma.gguf.reader.Value"""
    writer = gguf.GGUFWriter(path, architecture)
    for key, (kind, value) in metadata.items():
        item = gguf.GGUFValueType[KINDS[kind.removeprefix("arr[").removesuffix("]")]]
        kind, item = (gguf.GGUFValueType.ARRAY, item) if kind.startswith("arr[") else (item, None)
        writer.add_key_value(key, value, kind, item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


class LlamaCppVocabulary:
    """The vocabulary of a GGUF as llama.cpp reads it."""

    def __init__(self, path):
        self._library = library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
        library.llama_model_default_params.restype = ModelParams
        library.llama_model_load_from_file.restype = _pointer
        library.llama_model_load_from_file.argtypes = ctypes.c_char_p, ModelParams
        library.llama_model_get_vocab.restype = _pointer
        library.llama_model_get_vocab.argtypes = (_pointer,)
        library.llama_model_free.argtypes = (_pointer,)
        library.llama_vocab_n_tokens.argtypes = (_pointer,)
        library.llama_vocab_is_eog.argtypes, library.llama_vocab_is_eog.restype = (_pointer, _int), _bool
        library.llama_tokenize.argtypes = (_pointer, ctypes.c_char_p, _int, _pointer, _int, _bool, _bool)
        params = library.llama_model_default_params()
        # A check that the structure above is this version's: the defaults of four fields in its middle.
        assert (params.n_gpu_layers, params.split_mode, params.main_gpu, params.vocab_only) == (-1, 1, 0, False)
        params.vocab_only = True
        self._model = library.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp does not load {path}"
        self._vocabulary = library.llama_model_get_vocab(self._model)
        self.size = library.llama_vocab_n_tokens(self._vocabulary)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised, none added."""
        data = text.encode()
        tokens = (_int * (len(data) + 1))()
        n = self._library.llama_tokenize(self._vocabulary, data, len(data), tokens, len(tokens), False, True)
        return tokens[:n]

    def stop_ids(self) -> list[int]:
        return [i for i in range(self.size) if self._library.llama_vocab_is_eog(self._vocabulary, i)]

    def close(self):
        self._library.llama_model_free(self._model)
