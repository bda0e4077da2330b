"""Pictures and tables made from what a run recorded."""
