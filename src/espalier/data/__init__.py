"""From files of text to packed batches: examples, the token store on disk, the order of training, batches."""
