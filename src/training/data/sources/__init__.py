"""Where samples come from: webdataset shards, csv files, synthetic noise."""
