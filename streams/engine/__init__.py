"""Faust made to deliver by record batch: the only files that know the insides of Faust."""
