"""engine: jobs in; windows, then one summary or one named failure out.

Owns: one model on one device, the decoders. The only room that touches faster_whisper, ctranslate2, av and onnxruntime. May not
know the ledger, the configuration, the outbox or the network (except to fetch a model that is absent).
"""
