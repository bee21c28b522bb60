"""What is wrong with shards, found before a run trains on them."""
