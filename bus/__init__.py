"""NATS, and nothing but NATS: the hardened client, the embedded server, streams and consumers as data, and services
as ADR-32 describes them. It knows subjects and bytes; what they mean is decided elsewhere.

Neighbours use `client.Client`, `server.Server`, `service.Service` and the functions of `streams`.
"""
