"""From documents to windows of tokens: corpora, packing, the token cache, and the data options."""
