"""Other programs on the same shape, for `benchmark.py --against`: llama.cpp and transformers, where they are installed.

What it is: for each a class that makes a model of random weights and times a step or a prompt in this process, so that
rounds can alternate. Nothing here is needed to generate text:

    pip install llama-cpp-python gguf       # builds llama.cpp, some minutes
    pip install transformers

On a processor with tiles (AMX) GCC 12 leaves out what llama.cpp writes into their configuration, and the program crashes. Then:

    CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" pip install --no-binary llama-cpp-python llama-cpp-python gguf

What it is not: a comparison of quality, or of what these programs can do beyond one row of greedy text.
"""
import os
import tempfile
from pathlib import Path

import torch

GGUF_TYPES = {"": ["BF16"], "int8": ["Q8_0"], "int4": ["Q4_0"]}      # what is nearest to our weights, all tensors in it


class LlamaCpp:
    """llama.cpp through llama-cpp-python. Its weights go through a file in the temporary folder, as large as they are."""
    name = "llama.cpp"

    def __init__(self, args, kind: str, capacity: int, batch: int = 512):
        from llama_cpp import Llama
        self.kind = kind
        file = tempfile.NamedTemporaryFile(suffix=".gguf", delete=False)
        try:
            file.close()
            write_gguf(Path(file.name), args, kind)
            threads = torch.get_num_threads()
            self.model = Llama(file.name, n_ctx=capacity, n_batch=batch, n_ubatch=batch, n_threads=threads,
                               n_threads_batch=threads, verbose=False)
        finally:
            os.unlink(file.name)        # mapped: its contents stay until the model goes
        self.version = __import__("llama_cpp").__version__

    def prefill(self, tokens: int):
        self.model.n_tokens = 0
        self.model.eval([1] * tokens)

    def decode(self, filled: int, n: int):
        self.model.n_tokens = filled    # eval forgets what lies behind
        for _ in range(n):
            self.model.eval([1])


def write_gguf(path: Path, args, kind: str):
    """A Llama of these sizes without a vocabulary; every matrix repeats a block of random numbers."""
    import gguf
    import numpy as np
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (("context_length", args.max_position), ("embedding_length", args.dim), ("block_count", args.n_layers),
                       ("feed_forward_length", args.ffn_dim), ("head_count", args.n_heads), ("head_count_kv", args.n_kv_heads),
                       ("layer_norm_rms_eps", args.norm_eps), ("rope_freq_base", args.ropes[0].theta),
                       ("vocab_size", args.vocab_size), ("rope_dimension_count", args.head_dim)):
        getattr(writer, f"add_{add}")(value)
    writer.add_tokenizer_model("no_vocab")
    q, kv, f, D = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.ffn_dim, args.dim
    shapes = {"token_embd": (args.vocab_size, D)} | ({} if args.tied else {"output": (args.vocab_size, D)})
    for i in range(args.n_layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (
            ("attn_q", (q, D)), ("attn_k", (kv, D)), ("attn_v", (kv, D)), ("attn_output", (D, q)),
            ("ffn_gate", (f, D)), ("ffn_up", (f, D)), ("ffn_down", (D, f)))}
    block = {}                          # inputs -> 64 rows of them
    random = np.random.default_rng(0)
    for name, (rows, columns) in shapes.items():
        if columns not in block:
            block[columns] = gguf.quants.quantize(random.uniform(-0.03, 0.03, (64, columns)).astype(np.float32), type_)
        data = np.tile(block[columns].view(np.uint8), (-(-rows // 64), 1))[:rows]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=type_)
    for name in ["output_norm"] + [f"blk.{i}.{norm}" for i in range(args.n_layers) for norm in ("attn_norm", "ffn_norm")]:
        writer.add_tensor(f"{name}.weight", np.ones(D, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Transformers:
    """transformers, eager, with its growing cache, in bfloat16."""
    name, kind = "transformers", "bfloat16"

    def __init__(self, args, kind: str, capacity: int):
        import transformers
        self.version = transformers.__version__
        config = transformers.LlamaConfig(
            vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.ffn_dim, head_dim=args.head_dim,
            num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
            max_position_embeddings=args.max_position, tie_word_embeddings=args.tied, pad_token_id=None)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        rope = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        self.model = model.bfloat16().to_empty(device="cpu").eval()
        self.model.model.rotary_emb = rope              # to_empty forgot its frequencies
        self.model.tie_weights()
        for p in self.model.parameters():
            p.data.uniform_(-0.03, 0.03)
        self.cache = None

    def prefill(self, tokens: int):
        ids = torch.ones(1, tokens, dtype=torch.long)
        self.cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode(self, filled: int, n: int):
        if self.cache is None or self.cache.get_seq_length() < filled:
            self.prefill(filled)
        if (beyond := self.cache.get_seq_length() - filled):
            self.cache.crop(-beyond)
        ids = torch.ones(1, 1, dtype=torch.long)
        for _ in range(n):
            self.model(ids, past_key_values=self.cache, use_cache=True).logits.argmax(-1).item()


PEERS = {"llama.cpp": LlamaCpp, "transformers": Transformers}


def make_peers(names: list[str], args, mode: str, capacity: int) -> list:
    """The peers that are asked for; ValueError for one that is unknown, not installed, or of no use here."""
    found = []
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--against knows {', '.join(PEERS)}; not '{name}'")
        if args.n_experts:
            raise ValueError("--against compares dense Llamas only")
        for kind in GGUF_TYPES[mode] if name == "llama.cpp" else ["bfloat16"]:
            try:
                found.append(PEERS[name](args, kind, capacity))
            except ImportError as error:
                raise ValueError(f"--against {name}: {error}; scripts/peers.py tells how to install it") from None
    return found
