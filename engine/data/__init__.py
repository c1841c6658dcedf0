"""Everything on disk or in a bucket: stores, runs, images, and what reads them."""
