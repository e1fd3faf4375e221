"""Measuring: traces of requests, load on servers, statistics of comparisons, reports."""
