// As much of PTX as loading it needs: its version and target, and each kernel's name, parameters and limits.
#include "standin.h"
#include <cctype>
#include <cstdlib>
#include <cstring>

namespace standin {

// The text without comments, cut into words; punctuation stands alone.
static std::vector<std::string> words_of(const char *text) {
    std::vector<std::string> words;
    while (*text) {
        if (!strncmp(text, "//", 2)) {
            text += strcspn(text, "\n");
        } else if (!strncmp(text, "/*", 2)) {
            const char *end = strstr(text + 2, "*/");
            text = end ? end + 2 : text + strlen(text);
        } else if (isspace(static_cast<unsigned char>(*text))) {
            text++;
        } else {
            size_t length = strcspn(text, " \t\r\n(){}[],;=");
            words.emplace_back(text, length ? length : 1);
            text += length ? length : 1;
        }
    }
    return words;
}

static unsigned size_of(const std::string &type) {
    size_t digits = type.find_first_of("0123456789");
    return digits == std::string::npos ? 0 : static_cast<unsigned>(atoi(type.c_str() + digits)) / 8;
}

using Word = std::vector<std::string>::const_iterator;

// A declaration up to its `,`, `)` or `;`: the bytes of its type, times its length where it is an array.
static unsigned declared(Word &word, Word end) {
    unsigned bytes = 0;
    for (; word != end && *word != "," && *word != ")" && *word != ";"; ++word) {
        if (word->size() > 2 && (*word)[0] == '.' && strchr("bsuf", (*word)[1]) && isdigit(static_cast<unsigned char>((*word)[2])))
            bytes = size_of(*word);
        if (*word == "[" && word + 1 != end) bytes *= static_cast<unsigned>(atoi((word + 1)->c_str()));
    }
    return bytes;
}

static std::unique_ptr<Function> read_entry(Word &word, Word end, Module &module) {
    auto function = std::make_unique<Function>();
    function->module = &module;
    function->name = *word++;
    if (word != end && *word == "(")
        for (++word; word != end && *word != ")"; word != end && *word == "," ? ++word : word)
            if (unsigned bytes = declared(word, end)) function->params.push_back(bytes);
    for (; word != end && *word != "{"; ++word)
        if (*word == ".maxntid" || *word == ".reqntid") {
            unsigned threads = 1;
            for (++word; word != end && (isdigit(static_cast<unsigned char>((*word)[0])) || *word == ","); ++word)
                if (*word != ",") threads *= static_cast<unsigned>(atoi(word->c_str()));
            function->max_threads = std::min(function->max_threads, threads);
            --word;
        }
    unsigned depth = 0;
    for (; word != end; ++word) {
        depth += *word == "{";
        if (*word == ".shared") function->static_shared += declared(word, end);
        if (word != end && *word == "}" && --depth == 0) break;
    }
    return function;
}

// Newest PTX for a driver: 12.0 reads 8.0, each minor version one tenth more, 12.8 reads 8.7; 13.0 reads 9.0.
static int newest_ptx() {
    int version = static_cast<int>(setting("STANDIN_VERSION", 12080)), major = version / 1000, minor = version % 1000 / 10;
    if (major == 12) return 80 + std::min(minor, minor < 8 ? minor : minor - 1);
    return (major - 4) * 10 + minor;
}

CUresult load_ptx(const char *text, Module &module) {
    module.ptx = text;
    auto words = words_of(text);
    bool versioned = false, targeted = false;
    unsigned shared = 0; // of the whole file: counted for every kernel
    for (Word word = words.begin(); word != words.end(); ++word) {
        if (word + 1 == words.end()) break;
        if (*word == ".version") {
            versioned = true;
            if (static_cast<int>(atof((word + 1)->c_str()) * 10 + 0.5) > newest_ptx()) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
        } else if (*word == ".target") {
            targeted = true;
            if ((word + 1)->compare(0, 3, "sm_") != 0) return CUDA_ERROR_INVALID_PTX;
            if (atoi((word + 1)->c_str() + 3) > 80) return CUDA_ERROR_NO_BINARY_FOR_GPU;
        } else if (*word == ".shared") {
            shared += declared(word, words.end());
        } else if (*word == ".entry") {
            module.functions.push_back(read_entry(++word, words.end(), module));
        }
        if (word == words.end()) break;
    }
    if (!versioned || !targeted) return CUDA_ERROR_INVALID_PTX;
    for (auto &function : module.functions) function->static_shared += shared;
    return CUDA_SUCCESS;
}

} // namespace standin
