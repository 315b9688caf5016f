"""Lines and answers of jobs over an engine of counters."""


def prompts(count, **extra):
    return [{"prompt": "word " * (number % 9 + 1), "custom_id": f"id-{number}", **extra} for number in range(count)]


def by_id(records):
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records)
    return found


def text_of(record):
    return record["response"]["body"]["choices"][0]["text"]
