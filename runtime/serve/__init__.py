"""An OpenAI-compatible endpoint over a bundle; needs starlette and uvicorn, neither torch nor transformers."""
