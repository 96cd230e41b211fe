// What benchmarks/llama_cpp.py asks of llama.cpp, on token ids: texts to ids, ids to logits, ids to greedy ids.
//
//   runner tokenize MODEL TEXT OUT                TEXT: UTF-8; OUT: int32 ids
//   runner logits   MODEL TOKENS OUT THREADS HOW  TOKENS: int32 S, T, then S x T ids; OUT: float32 S x T x V
//   runner greedy   MODEL TOKENS OUT THREADS HOW N SIDE                          OUT: int32 S x N
//
// HOW: "default", as a user runs it: keys and values in fp16, flash attention where it fits, weights repacked for the CPU;
// "f32-cache": keys and values in fp32, no flash attention; "no-repack". SIDE: how many prompts are decoded side by side.
#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static void fail(const std::string & what) {
    fprintf(stderr, "%s\n", what.c_str());
    exit(1);
}

static std::string read_file(const char * path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail(std::string("cannot read ") + path);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

static void decode(llama_context * context, const int32_t * tokens, int32_t side, int32_t count, int32_t position, bool all) {
    llama_batch batch = llama_batch_init(side * count, 0, 1);
    for (int32_t i = 0; i < side * count; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = position + i % count;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = i / count;
        batch.logits[i] = all || i % count == count - 1;
    }
    batch.n_tokens = side * count;
    if (llama_decode(context, batch) != 0) fail("llama_decode failed");
    llama_batch_free(batch);
}

int main(int argc, char ** argv) {
    if (argc < 5) fail("runner tokenize|logits|greedy MODEL INPUT OUT [THREADS HOW] [N SIDE]");
    const std::string mode = argv[1], how = argc > 6 ? argv[6] : "";
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.vocab_only = mode == "tokenize";
    model_params.use_extra_bufts = how != "no-repack";
    llama_model * model = llama_model_load_from_file(argv[2], model_params);
    if (!model) fail("cannot load the model");
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const std::string input = read_file(argv[3]);
    std::ofstream out(argv[4], std::ios::binary);

    if (mode == "tokenize") {
        std::vector<llama_token> ids(input.size() + 8);
        const int32_t count = llama_tokenize(vocab, input.data(), input.size(), ids.data(), ids.size(), false, false);
        if (count < 0) fail("llama_tokenize failed");
        out.write(reinterpret_cast<const char *>(ids.data()), 4 * count);
        return 0;
    }
    const int32_t * numbers = reinterpret_cast<const int32_t *>(input.data());
    const int32_t sequences = numbers[0], length = numbers[1];
    const int32_t vocab_size = llama_vocab_n_tokens(vocab);
    const int32_t wanted = mode == "greedy" ? atoi(argv[7]) : 0, side = mode == "greedy" ? atoi(argv[8]) : 1;
    if (sequences % side) fail("SIDE must divide the number of prompts");
    llama_context_params params = llama_context_default_params();
    params.n_seq_max = side;
    params.n_ctx = side * GGML_PAD(length + wanted, 256);
    params.n_batch = params.n_ubatch = side * length;
    params.n_threads = params.n_threads_batch = atoi(argv[5]);
    params.no_perf = true;
    if (how == "f32-cache") {
        params.type_k = params.type_v = GGML_TYPE_F32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    llama_context * context = llama_init_from_model(model, params);
    if (!context) fail("cannot make a context");
    for (int32_t first = 0; first < sequences; first += side) {
        llama_memory_clear(llama_get_memory(context), true);
        decode(context, numbers + 2 + int64_t(first) * length, side, length, 0, mode == "logits");
        if (mode == "logits") {
            for (int32_t t = 0; t < length; t++) {
                out.write(reinterpret_cast<const char *>(llama_get_logits_ith(context, t)), 4 * int64_t(vocab_size));
            }
            continue;
        }
        std::vector<int32_t> found(int64_t(side) * wanted), last(side);
        for (int32_t n = 0; n < wanted; n++) {
            const int32_t count = n == 0 ? length : 1;
            for (int32_t s = 0; s < side; s++) {
                const float * logits = llama_get_logits_ith(context, (s + 1) * count - 1);
                last[s] = found[int64_t(s) * wanted + n] = std::max_element(logits, logits + vocab_size) - logits;
            }
            if (n + 1 < wanted) decode(context, last.data(), side, 1, length + n, false);
        }
        out.write(reinterpret_cast<const char *>(found.data()), 4 * found.size());
    }
    return 0;
}
