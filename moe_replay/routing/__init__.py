"""Routes: what they are, how a live model records and replays them, what is measured of them."""
