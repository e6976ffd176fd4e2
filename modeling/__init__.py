"""The one view of a decoder: where its weights come from, its blocks, and how it is saved."""
