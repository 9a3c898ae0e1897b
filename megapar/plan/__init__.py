"""Foresight: what any rank of a configured layout would hold and do, without the other ranks and without memory."""
