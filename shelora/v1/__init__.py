"""Messages and stubs generated from protos/shelora/v1 by `make protos`; never edited by hand."""
