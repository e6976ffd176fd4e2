"""The rules of a KV cache of fixed size, once for torch, ONNX Runtime and llama.cpp. Numpy alone.

`settings` says how much is held and how a prompt is read, `steps` plans the reading, `policies` score what was read,
`eviction` chooses what stays. The caches themselves are their runtimes': `evaluation/kv_cache.py`,
`runtime/bounded_text.py` and `runtime/llamacpp_kv.py`.
"""
