"""
What other people call things: a table of flags, of files that are not text, and of lines of json.

The scripts look here when something does not fit, so that the error names the cure. It imports nothing.
"""

# flags of DPR, GC-DPR and nanoDPR: what is called so here, by script
SYNONYMS = {
    "lr": "learning_rate",
    "train_file": "train",
    "dev_file": "dev",
    "q_chunk_size": "question_chunk",
    "ctx_chunk_size": "passage_chunk",
    "hard_negatives": "negatives",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "dev_batch_size": "eval_batch_size",
    "encoding_batch_size": "batch_size",
    "max_train_epochs": "epochs",
    "num_train_epochs": "epochs",
    "warmup_steps": "warmup",
    "adam_eps": "adam_epsilon",
    "sequence_length": "passage_tokens question_tokens reader_tokens",
    "logging_steps": "log_every",
    "log_batch_step": "log_every",
    "base_model": "init",
    "pretrained_model_cfg": "init",
    "pretrained_file": "init",
    "pretrained_model_path": "doc_encoder query_encoder",
    "model_file": "doc_encoder query_encoder reader init",
    "wikipedia_path": "corpus",
    "ctx_file": "corpus",
    "ctx_src": "corpus",
    "nq_test_file": "questions",
    "qa_file": "questions",
    "qa_dataset": "questions",
    "embedding_dir": "embeddings",
    "encoded_ctx_file": "embeddings",
    "encoded_ctx_files": "embeddings",
    "output_dir": "run_dir out",
    "out_file": "out",
    "prediction_results_file": "out",
    "n_docs": "k",
    "top_k": "k",
    "num_shards": "servers",
    "shard_id": "server",
    "fp16": "mixed_precision",
    "passages_per_question_predict": "depth test_depth",
    "hnsw_index": "index",
}

# the first bytes of files that are not text, and the command that makes one of them
KINDS = {
    b"\x1f\x8b": "is compressed; unpack it first: gunzip {path}",
    b"PK\x03\x04": "is a zip archive (or a spreadsheet); unpack it first: unzip {path}",
    b"BZh": "is compressed; unpack it first: bunzip2 {path}",
    b"\xfd7zXZ": "is compressed; unpack it first: unxz {path}",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it first: zstd -d {path}",
    b"PAR1": "is a parquet file; README.md shows how python makes text of a table",
    b"ARROW1": "is an arrow file; README.md shows how python makes text of a table",
    b"SQLite": "is a database; README.md shows how python makes text of a table",
    b"%PDF": "is a PDF; make a text of it first: pdftotext {path}",
    b"\xff\xfe": "is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {path} -o OUT",
    b"<!": "is an html page; was its download refused?",
    b"<html": "is an html page; was its download refused?",
    b"version https://git-lfs": "is a pointer of git-lfs; get the file itself: git lfs pull",
    b"\x80\x04": "is a pickle; let the program that made it write text",
    b"\xff\xff\xff\xff": "is an arrow file; README.md shows how python makes text of a table",
    b"\xfe\xff": "is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {path} -o OUT",
}


def kind_of(line, path):
    """Return what a file is that begins with the bytes `line`, with the cure; "" for text."""
    for begin, cure in KINDS.items():
        if line.startswith(begin):
            return cure.format(path=path)
    return ""


# the keys of other people's lines -> what the file is, and what to do with it
CONVERT = "first: python -m prepare.convert"
FOREIGN = {
    ("positive_passages",): f"is Tevatron's training file; {CONVERT} tevatron {{path}} OUT",
    ("positive_ctxs",): f"is DPR's training file; {CONVERT} dpr_json {{path}} OUT",
    ("ctxs",): f"is a retrieval result (DPR, FiD); {CONVERT} from_dpr_result {{path}} FOLDER",
    ("contexts",): f"is Pyserini's retrieval result; {CONVERT} from_dpr_result {{path}} FOLDER",
    ("qid", "positive_ctxs"): f"is ANCE-Tele's training file; {CONVERT} ance_tele {{path}} OUT",
    ("query", "negatives"): f"is ANCE-Tele's, token ids; {CONVERT} ance_tele_hn {{path}} vocab.txt OUT",
    ("query_id", "query"): f"is Tevatron's question file; {CONVERT} tevatron {{path}} OUT",
    ("data",): "is SQuAD's json; README.md shows how ten lines of python convert it",
    ("paragraphs",): "is SQuAD's json; README.md shows how ten lines of python convert it",
    ("_id", "text"): f"is BEIR's; {CONVERT} beir {{path}} [qrels/test.tsv] OUT",
    ("question", "answer"): f"is NQ-open's; {CONVERT} nq_open {{path}} OUT",
}


def foreign(entry, path):
    """Return what a line of somebody else's question file is, with the cure; "" for one that is not known."""
    for keys, cure in FOREIGN.items():
        ours = "qid" in entry and ("qid" not in keys or "positives" in entry)
        if entry.keys() >= set(keys) and not ours:
            return cure.format(path=path)
    return ""
