"""Plans: what every rank of a layout holds and does, replayed without the other ranks, against what is written down."""
