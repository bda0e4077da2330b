"""Images from outside, and the network and digits that zsq brings."""
