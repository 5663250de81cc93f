"""What the models eat: atomic files, item features, categories, item graphs."""
