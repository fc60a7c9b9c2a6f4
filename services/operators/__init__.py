"""What the people who run a federation use: the `shelora` command line, and the demonstration on one machine."""
