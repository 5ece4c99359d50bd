"""Models on disk: the folder's format and its checks, saving, loading, and the hook into diffusers' own loading."""
