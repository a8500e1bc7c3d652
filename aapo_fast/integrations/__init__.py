"""Other people's trainers with the fused loss. One file a package; nothing else here imports them."""
