"""The rules of a KV cache of fixed size, shared by torch, ONNX Runtime and llama.cpp. Numpy only.

`settings` has the budget and how a prompt is read, `steps` plans the reading, `policies` score tokens, `eviction`
chooses what to keep. The caches themselves are in `evaluation/kv_cache.py`, `runtime/bounded_text.py` and
`runtime/llamacpp_kv.py`.
"""
