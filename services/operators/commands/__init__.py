"""The commands of `shelora`, one module a group."""
